"""What all reports share: HTML pages and the style of their figures."""

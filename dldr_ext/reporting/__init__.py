"""How reports look: HTML pages and the style of their figures."""

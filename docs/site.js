// What scrolls can be reached with the keyboard, and bars over code have names of their own. The theme makes
// these parts itself, after this.
document$.subscribe(() =>
  setTimeout(() => {
    for (const part of document.querySelectorAll("pre > code, .md-typeset__scrollwrap")) part.tabIndex = 0;
    document.querySelectorAll(".md-code__nav").forEach((bar, i) => (bar.ariaLabel = `Code ${i + 1}`));
  }, 100),
);

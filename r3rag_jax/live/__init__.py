"""Questions that people ask, in a terminal and on a page, answered as they watch."""

"""Reports for people to look at: one plain model of a page, and the HTML that shows it."""

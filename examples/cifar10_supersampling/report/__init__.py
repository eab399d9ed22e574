"""``python -m examples.cifar10_supersampling.report``: what the rows of a grid say, for readers.

Read in this order: `rows` (what is read), `settings` (what is compared), `tables` (those beside
`examples.comparison`, which has the statistics), `drawings`, `pages` (how these become Markdown and
HTML, by the templates `report.*.jinja`), `__main__` (the command).
"""

"""``python -m examples.cifar10_supersampling.report``: what the rows of a grid say, for readers.

Read in this order: `rows` (what is read), `differences` (the statistics), `settings` (what is
compared), `tables`, `drawings`, `pages` (how these become Markdown and HTML, by the templates
`report.*.jinja`), `__main__` (the command).
"""

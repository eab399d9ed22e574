"""``python -m examples.cifar10_supersampling.report``: a report of a grid's results.

Read in this order: `rows` (input), `settings` (what is compared), `tables` (`examples.comparison`
has the statistics and the other tables), `drawings`, `pages` (Markdown and HTML, from the templates
`report.*.jinja`), `__main__` (the command).
"""

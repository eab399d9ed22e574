"""How the examples compare methods: the same training unprotected and protected in several ways.

Read in this order: `clippers` (methods of other packages, as callbacks), `methods` (what each
method is), `files` (the files of a training), `backends` and `running` (many trainings, each once),
`differences` (the statistics), `settings` (what is compared with what), `tables`, `compare` (a
whole comparison, for an example in one file), `extras` (packages that a part needs).
"""

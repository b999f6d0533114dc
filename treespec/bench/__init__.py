"""Benchmarks of whole generations: `treespec bench reference` and `treespec bench suite`.

`models` loads a pair, `methods` names the ways to continue a prompt, `protocol` times them in turns
and checks every text, `results` keeps the samples, `figures` turns samples into rows, and `tables`,
`plots` and `page` show rows. None of them is needed to generate.
"""

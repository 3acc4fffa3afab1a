"""The registries and the plan: the families of models, the configuration, and the plan.

The Snakefile imports this: standard library, PyYAML, pandas and jsonschema only. Scores and the report ask for
`families` alone.
"""

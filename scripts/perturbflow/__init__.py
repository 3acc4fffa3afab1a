"""perturbflow: from raw Perturb-seq files to honestly scored perturbation models.

The modules follow the way the data flow and import only backwards along it:
registry → download → harmonize → splits → pairs → embeddings → models → evaluation → counterfactuals → report.
`registry`, `records` and `code_version` are all that the Snakefile imports: they need no torch, scanpy or anndata.
"""

__version__ = "0.2.0"

"""Model families: one class each behind the interface in `base`. `perturbflow.registry.FAMILIES` finds them by name."""

"""Model families: one class each behind the interface in `base`. `perturbflow.registry.families` finds them by name."""

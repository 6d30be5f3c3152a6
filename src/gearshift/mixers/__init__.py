"""Token mixers, one folder each. A folder's `KIND` is found by the registry in `gearshift.spec.registry`."""

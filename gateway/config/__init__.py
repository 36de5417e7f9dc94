"""The configuration: YAML files, checked as a whole, and the frozen values that the gateway works with."""

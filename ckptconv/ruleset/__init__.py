"""The rule language: YAML files, name patterns, expressions, and steps that map one table of expressions to another."""

"""The papers' claims as experiments: arms x seeds -> a number each, a declared relation, a computed verdict."""

"""How good a backbone is: features once, then every protocol on them. `score.score` runs them all."""

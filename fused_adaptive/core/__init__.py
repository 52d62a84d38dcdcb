"""Foundations that all other folders import: state, views, shards, numbers. Nothing here depends on a policy."""

"""Tests with modules of other packages: each is skipped where its package is absent."""

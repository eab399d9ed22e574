"""Tests with modules of other packages: each is skipped if its package is missing."""

"""Tests of many runs: sweeps and searches."""

"""Corpora, base models and in-process federations: what the demo and the evaluation harness train."""

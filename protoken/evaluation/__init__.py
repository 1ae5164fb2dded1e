"""Corpora, base models and in-process federations: what the demo and the experiments train, and how they are judged.

rows          corpora.py, generator, loader and poisoning; domain_medical.py, domain_finance.py, domain_math.py,
              domain_coding.py; sources.py, which rows train and which are asked
models        base_model.py, the demo's; zoo.py, the experiments'
federations   federation.py, FedAvg in one process; training.py, a client's part; federation_store.py, kept on disk
experiments   experiments/, one module each; harness.py runs their units, runs.py keeps them, workbench.py is what they
              work with, scoring.py answers and scores, progress.py shows how far they are
figures       metrics.py, cells.py (the schema of results.json), report.py (tables), plots.py
"""

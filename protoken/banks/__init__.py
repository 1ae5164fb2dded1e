"""The clients' updates on their way from the ledger to the kernels.

bank.py           a round's updates, or several rounds', for the layers of a plan
layer_bank.py     those of one layer in the formats that the ops read, and the ops called with them
lineage_sums.py   rounds added up, a client at a time
"""

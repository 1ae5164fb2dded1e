"""Methods beside the default one; each module says what it answers, its cost and its limits.

replayed.py         all that replay the finished response at other weights, by name: the others' way in
aumann_shapley.py   the path integral; placement.py, where its nodes go; spline.py
shapley.py          exact or sampled; paired_shapley.py, nearly as good for about 3 K evaluations;
                    coalitions.py, what both ask of the game
leave_one_out.py    one client taken out
baselines.py        what simpler rules would say
paper.py            the published loop, the oracle of the tests

game.py             how likely is the response at other weights? updates.py, the clients' updates; weights.py, the
                    points that they lead to; moved.py, the model there, without writing to it
"""

"""`pgm-scale report`: curves of training runs, quality against speed, and a page that holds them.

metrics_file.py     the records of a `metrics.jsonl`
training_runs.py    a run folder as labelled columns of numbers
evaluations.py      results of `eval` and `eval-images` as points of quality and speed
panels.py           a picture before it is drawn: axes, lines, marks; plain numbers
training_panels.py  which pictures of training runs there are
quality_panels.py   which pictures of evaluations there are
drawing.py          a panel to PNG
sections.py         the tables of the page
page.py             everything as one HTML page
command.py          read, draw, write
overview.py         one small picture of one run, for the demo
"""

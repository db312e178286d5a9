"""Following a run or a night from another terminal: `slimline watch`.

find.py      which one is meant
state.py     how far it is, from the files of infra/running and the artifact store; read this first
forecast.py  how long a stage will take, from how long its like took before
words.py     the sentences and lines about it
screen.py    a table that is redrawn in a terminal, a line per change everywhere else, until the run ends

It only reads: nothing here touches the run, nor asks Prefect's server. May import flows.records and infra.
"""

"""The `slimline` command line, a file per group of commands; flows/__main__.py registers them. Read app.py first.

* app.py: the typer application and the options that commands share.
* runs.py: run, plan. nights.py: nightly, nights. retry.py: retry. serve.py: serve, ui.
* results.py: results, list, doctor, compare. report.py: sql, report. doctor.py: what the doctor examines.
* watch.py: watch. store.py: verify, gc, import. checkpoints/: export, push, chat.

Commands parse, call and print, and import what they call inside their functions: `slimline --help` must not wait for
torch or Prefect. May import everything else in flows, and infra.
"""

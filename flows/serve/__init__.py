"""Runs and nights on a schedule: `slimline serve`, and what a Prefect worker runs for prefect.yaml.

schedule.py     read it first: deployments of specs with a cron or interval, a Prefect server unless one is configured
deployments.py  the flows that deployments name as entrypoint; importing it prepares a process that Prefect started
automations.py  the automation that marks flow runs as crashed when their process was killed

How served flow runs end with their server, and how servers are started: flows/runtime. May import everything in flows
but flows.commands, which alone imports this folder.
"""

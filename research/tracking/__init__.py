"""Where runs live and how they get there.

store        which store a run goes to, and the command that shows it there
limits       what MLflow takes: names, lengths

The training process's end
run          start a run or go on with one, hand records over, never wait
companion    the process beside it, kept alive, and the thread that feeds it
spool        all that a run was told, on disk until it is in the store

The companion process's end
recorder     takes the records
beginning    makes a run in the store, or goes on with one
delivery     brings one record after the other to the store, also after an outage
repeats      which of them the store has already
opening      opens stores, makes their experiments
lock         one process at a time opens a store
troubles     why a record did not get through, in plain words
heartbeat    signs of life, and the end of runs that give none

What is recorded of every run
provenance   what was run: command, commit, versions, machine; hashes that tell repeats
changes      what differs from the commit, as a patch
environment  package versions and the machine, as files
datasets     a split of a data set as an input of a run
monitoring   MLflow's system metrics
model        a checkpoint as a model of MLflow's
serving      how such a model is served, without this project
view         what the runs' page shows first

logger       the run as a Lightning logger
runs         recorded runs, found by id or name and read back
arms         runs, parents and searches as a comparison reads them; looks at test, counted
lookup       what is asked of a store through MLflow's client
redelivery   delivers what waits in a spool when nobody else is left to
moved        stores whose project was moved or copied, moved_spool likewise

Training never imports MLflow (1 to 3 s, and several ms a call): a companion process does, on
another core, while the training process still imports torch. The two talk over a pipe. Only the
commands that read runs back (evaluate, predict, repair, and fit --resume) import it themselves.
"""

"""Where runs live and how they get there.

store        which store a run goes to, and the command that shows it there
limits       what MLflow takes: names, lengths
run          the training process's end: start a run, hand records over, never wait
recorder     the companion process's end: takes the records, delivers them
opening      opens stores in the companion, makes their experiments
troubles     why a record did not get through, in plain words
provenance   what was run: command, commit, versions, machine; hashes that tell repeats
changes      what differs from the commit, as a patch
environment  package versions and the machine, as files
datasets     a split of a data set as an input of a run
monitoring   MLflow's system metrics, sampled in the companion
logger       the same run as a Lightning logger
runs         recorded runs, found by id or name and read back

Training never imports MLflow (1 to 3 s, and several ms a call): a companion process does, on
another core, while the training process still imports torch. The two talk over a pipe. Only the
commands that read runs back (evaluate, predict) import it themselves.
"""

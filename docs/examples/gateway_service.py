"""Print the regions of a run as soon as it has ended."""

from defuse import Client

with Client() as client:  # DEFUSE_GATEWAY, or the stack that `defuse up` started
    run = client.wait_for_run("first")
    for region in client.regions(run.id):
        print(region.id, region.true_label, "taken for", region.predicted_label, region.error_rate)

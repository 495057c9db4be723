"""Tables of all calls, from which both clients get their methods.

A call is a generator without I/O (`defuse.calls.sans_io`). To add a call, define it in the module of its resource, list
it here, and run `python -m clients.generate_stubs`.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

from defuse.calls import corrections, models, monitoring, regions, runs, uploads
from defuse.calls.sans_io import SansIoCall, StreamRpc

Call: TypeAlias = Callable[..., SansIoCall[Any] | StreamRpc[Any]]

# Methods of `defuse.Client` and `defuse.aio.Client`, by name.
CLIENT_CALLS: Final[Mapping[str, Call]] = {
    "version": models.version,
    # models and guards
    "add_model": models.add_model,
    "model": models.model,
    "models": models.models,
    "create_guard": models.create_guard,
    "guard": models.guard,
    "guards": models.guards,
    # data sets
    "add_dataset": uploads.add_dataset,
    # runs
    "create_run": runs.create_run,
    "estimate_run": runs.estimate_run,
    "run": runs.run,
    "runs": runs.runs,
    "watch_run": runs.watch_run,
    "wait_for_run": runs.wait_for_run,
    "cancel_run": runs.cancel_run,
    "failures": runs.failures,
    "advise_validity": runs.advise_validity,
    # regions
    "regions": regions.regions,
    "region": regions.region,
    "sample_region": regions.sample_region,
    "diff_regions": regions.diff_regions,
    "export_regions": regions.export_regions,
    "annotate": regions.annotate,
    # corrections
    "create_correction": corrections.create_correction,
    "correction": corrections.correction,
    "corrections": corrections.corrections,
    "wait_for_correction": corrections.wait_for_correction,
    "cancel_correction": corrections.cancel_correction,
    # the gate and releases
    "judge": corrections.judge,
    "verdict": corrections.verdict,
    "release": corrections.release,
    "rollback": corrections.rollback,
    "releases": corrections.releases,
    # trials
    "start_trial": corrections.start_trial,
    "trials": corrections.trials,
    "trial": corrections.trial,
    "stop_trial": corrections.stop_trial,
    # monitoring and audit
    "monitor": monitoring.monitor,
    "configure_monitor": monitoring.configure_monitor,
    "alerts": monitoring.alerts,
    "watch_alerts": monitoring.watch_alerts,
    "start_alert_run": monitoring.start_alert_run,
    "attach_truth": monitoring.attach_truth,
    "delete_observations": monitoring.delete_observations,
    "audit_events": monitoring.audit_events,
}

# Methods of both `LatentSpace` classes, by name; each takes the run's id first.
LATENT_SPACE_CALLS: Final[Mapping[str, Call]] = {
    "encode": regions.encode,
    "decode": regions.decode,
    "interpolate": regions.interpolate,
}

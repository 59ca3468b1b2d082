"""What TensorBoard's own plugins make of a directory of event files: the pages that people see, as data."""

import json
from pathlib import Path

from tensorboard import context
from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
from tensorboard.plugins import base_plugin
from tensorboard.plugins.custom_scalar.custom_scalars_plugin import CustomScalarsPlugin
from tensorboard.plugins.hparams import api_pb2, backend_context, get_experiment, list_session_groups

NO_LIMIT = {"scalars": 0, "tensors": 0}


def open_directory(directory: Path) -> base_plugin.TBContext:
    multiplexer = plugin_event_multiplexer.EventMultiplexer(tensor_size_guidance=NO_LIMIT, size_guidance=NO_LIMIT)
    multiplexer.AddRunsFromDirectory(str(directory)).Reload()
    provider = data_provider.MultiplexerDataProvider(multiplexer, str(directory))
    return base_plugin.TBContext(data_provider=provider, logdir=str(directory))


def custom_scalars_page(directory: Path) -> dict[str, dict[str, list[str]]]:
    """{category: {chart: its patterns of tags}}."""
    found = json.loads(CustomScalarsPlugin(open_directory(directory)).layout_impl(context.RequestContext(), "") or "{}")
    return {
        category["title"]: {chart["title"]: chart["multiline"]["tag"] for chart in category["chart"]}
        for category in found.get("category", [])
    }


def hparams_columns(directory: Path) -> tuple[set[str], set[str]]:
    """(names of settings, tags of metrics) that the table has columns for."""
    known, ctx = backend_context.Context(open_directory(directory)), context.RequestContext()
    found = get_experiment.Handler(ctx, known, "", api_pb2.GetExperimentRequest()).run()
    return {info.name for info in found.hparam_infos}, {info.name.tag for info in found.metric_infos}


def hparams_page(directory: Path) -> dict[str, tuple[dict, dict, str]]:
    """{run: (settings, {metric: its last value}, status)}: the rows of the table."""
    known = backend_context.Context(open_directory(directory))
    statuses = [
        api_pb2.Status.Value(name) for name in ("STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING")
    ]
    request = api_pb2.ListSessionGroupsRequest(start_index=0, slice_size=100, allowed_statuses=statuses)
    found = list_session_groups.Handler(context.RequestContext(), known, "", request).run()
    return {
        session.name: (
            {name: getattr(value, value.WhichOneof("kind")) for name, value in group.hparams.items()},
            {metric.name.tag: metric.value for metric in session.metric_values},
            api_pb2.Status.Name(session.status),
        )
        for group in found.session_groups
        for session in group.sessions
    }

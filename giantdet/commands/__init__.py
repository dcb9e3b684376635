"""The commands of `giantdet`, one module each: `add` describes the arguments, `run` takes them parsed.

Heavy imports are inside the functions, so that help texts and errors appear at once.
"""

from giantdet.commands import (
    configs,
    doctor,
    evaluate,
    export,
    export_graph,
    import_weights,
    make_demo_data,
    plan,
    plot,
    precise_bn,
    predict,
    push,
    report,
    train,
    validate_data,
)

COMMANDS = (  # in the order of the help text
    train,
    evaluate,
    predict,
    export,
    export_graph,
    precise_bn,
    report,
    plot,
    plan,
    doctor,
    validate_data,
    configs,
    make_demo_data,
    import_weights,
    push,
)

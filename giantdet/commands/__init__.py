"""The commands of `giantdet`, one module each: `add` describes the arguments, `run` takes them parsed.

Heavy imports are inside the functions, so that help texts and errors appear at once.
"""

from giantdet.commands import (
    configs,
    doctor,
    evaluate,
    export,
    export_graph,
    import_data,
    import_weights,
    make_demo_data,
    new,
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
    import_data,
    validate_data,
    new,
    train,
    evaluate,
    predict,
    report,
    export,
    export_graph,
    push,
    import_weights,
    precise_bn,
    plot,
    plan,
    doctor,
    configs,
    make_demo_data,
)

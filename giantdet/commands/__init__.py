"""The commands of `giantdet`, one module each: `add` describes the arguments, `run` takes them parsed.

Heavy imports are inside the functions, so that help texts and errors appear at once.
"""

from giantdet.commands import (
    configs,
    doctor,
    evaluate,
    export,
    import_data,
    import_weights,
    make_demo_data,
    new,
    plan,
    plot,
    precise_bn,
    predict,
    train,
    validate_data,
)

COMMANDS = (  # in the order of the help text
    train,
    evaluate,
    predict,
    export,
    precise_bn,
    plot,
    plan,
    doctor,
    import_data,
    validate_data,
    new,
    configs,
    make_demo_data,
    import_weights,
)

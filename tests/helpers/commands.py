"The command in this process."
from typer.testing import CliRunner
from hedgehog_nb.cli import app

def hedgehog(*args, code=0, **kw):
    "What `hedgehog` printed, stdout and stderr kept apart; it must end with `code`."
    r = CliRunner().invoke(app, [str(a) for a in args], prog_name='hedgehog', **kw)
    assert r.exit_code==code, (r.stdout, r.stderr, r.exception)
    return r

"""The command line. Each command is thin: it parses, calls one function of the package and prints."""

import click


class _Errors(click.Group):
    """Print errors about bad input as one line; any other error keeps its traceback."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except (ValueError, FileNotFoundError, FileExistsError, PermissionError, KeyError) as error:
            message = error.args[0] if isinstance(error, KeyError) and error.args else error
            raise click.ClickException(str(message)) from error


@click.group(cls=_Errors, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="moeits")
def main() -> None:
    """Prune the redundant experts of a Mixture-of-Experts language model (MoEITS, arXiv 2604.10603)."""


if __name__ == "__main__":
    main()

"""The supplementary page, section by section; `eqst.report` is its command."""

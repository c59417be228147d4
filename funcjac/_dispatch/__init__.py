"""Which way a call runs: the rule, what is remembered of earlier calls, and what comes next."""

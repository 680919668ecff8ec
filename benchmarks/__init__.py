"""One question a file; JSON out; ratios to openssl of the same run."""

"""What a model kept, measured: suites of items, engines that answer them, metrics that judge the answers, scores beside a teacher's."""

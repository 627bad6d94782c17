from hypothesis import settings

collect_ignore_glob = ["golden/*"]  # scripts that made the golden data need what tests do not

settings.register_profile("bitnet", deadline=None, derandomize=True, database=None)
settings.load_profile("bitnet")

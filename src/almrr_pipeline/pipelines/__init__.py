"""The Kedro pipelines: load, call, return. What is called lives in the packages beside this one."""

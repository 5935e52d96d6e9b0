"""The decision: audits, policy, verdict, reports and the command line."""

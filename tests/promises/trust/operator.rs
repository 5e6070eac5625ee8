//! The operator slips: a wrong file, a loose mode, a broker without a login.

CREATE INDEX families_subject_jti_idx ON families (subject_jti);

ALTER TABLE jobs DROP CONSTRAINT jobs_pkey;
ALTER TABLE jobs ADD CONSTRAINT jobs_pkey PRIMARY KEY (job_id, client_id);
ALTER TABLE jobs ADD COLUMN replica_files smallint[] DEFAULT '{}' NOT NULL;
ALTER TABLE jobs ADD COLUMN replica_ids bigint[] DEFAULT '{}' NOT NULL;

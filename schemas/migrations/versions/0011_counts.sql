ALTER TABLE processes ADD COLUMN facts jsonb NOT NULL DEFAULT '{}';

CREATE TABLE counts (
    minute timestamptz NOT NULL,
    process_id uuid NOT NULL,
    vo text NOT NULL,
    kind text NOT NULL,
    label text NOT NULL,
    amount bigint NOT NULL,
    PRIMARY KEY (minute, process_id, vo, kind, label)
);

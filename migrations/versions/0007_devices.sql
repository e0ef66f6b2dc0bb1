-- Devices: what a model was measured to need on one, and what is wrong with a worker or with a model on it.

-- What `farm models verify` measured, newest only: one frame of a size, and two.
CREATE TABLE measurements (
    model          text             NOT NULL,
    revision       text             NOT NULL,
    precision      text             NOT NULL, -- bfloat16, bfloat16+fp8
    device         text             NOT NULL, -- its name, as the driver says it
    width          integer          NOT NULL CHECK (width > 0),
    height         integer          NOT NULL CHECK (height > 0),
    steps          integer          NOT NULL CHECK (steps > 0),
    load_s         double precision NOT NULL CHECK (load_s >= 0),
    seconds        double precision NOT NULL CHECK (seconds > 0), -- of one frame
    resident_bytes bigint           NOT NULL CHECK (resident_bytes >= 0), -- loaded, and nothing to do
    peak_bytes     bigint           NOT NULL CHECK (peak_bytes >= resident_bytes), -- with one frame
    peak_two_bytes bigint           CHECK (peak_two_bytes >= resident_bytes), -- with two; NULL: two did not fit
    measured_at    timestamptz      NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (model, revision, precision, device, width, height)
);

-- What a worker does not claim for a while. Tokens are not sent to it for that.
CREATE TABLE ailments (
    worker text        NOT NULL REFERENCES workers ON DELETE CASCADE,
    model  text        NOT NULL, -- '': the device itself, so every model
    reason text        NOT NULL CHECK (reason <> ''),
    times  integer     NOT NULL CHECK (times > 0), -- in a row: the pause doubles
    since  timestamptz NOT NULL DEFAULT clock_timestamp(),
    until  timestamptz NOT NULL,
    PRIMARY KEY (worker, model)
);

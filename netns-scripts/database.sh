# shellcheck shell=bash
# Sourced by the scripts beside it: installs database servers, and runs one, MariaDB or
# PostgreSQL as STORE says (mysql, postgres), in the laboratory's namespace "db", on the disk
# that HOLDER[db] has mounted there. It listens on db's underlay address, lets the user mesh in
# with the password in $LAB/db.password, and has a database meshd that is that user's.

# The database servers that stores are tested on. The tests start their own, so the packages' services must not start: no
# service does while policy-rc.d says 101, and PostgreSQL makes no cluster.
databases() {
    local policy=/usr/sbin/policy-rc.d conf=/etc/postgresql-common missing=()
    [ -x /usr/sbin/mariadbd ] || missing+=(mariadb-server)
    compgen -G '/usr/lib/postgresql/*/bin/postgres' >/dev/null || missing+=(postgresql)
    command -v etcd >/dev/null || missing+=(etcd-server)
    command -v etcdctl >/dev/null || missing+=(etcd-client)
    [ ${#missing[@]} -gt 0 ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 0
    if [ ! -e $conf/createcluster.conf ]; then
        mkdir -p $conf
        echo 'create_main_cluster = false' >$conf/createcluster.conf
    fi
    if [ -e $policy ]; then
        apt_install "${missing[@]}"
    else
        printf '#!/bin/sh\nexit 101\n' >$policy
        chmod +x $policy
        apt_install "${missing[@]}"
        rm -f $policy
    fi || warn "no ${missing[*]}: stores are not tested on them"
}

DB_BIN=$(compgen -G '/usr/lib/postgresql/*/bin' | sort -V | tail -n1)

in_db() { # CMD…: as the database's own user, where its disk and its network are; with EXEC=exec in this shell's place
    local user=mysql
    [ "$STORE" = mysql ] || user=postgres
    ${EXEC:-} nsenter --target "${HOLDER[db]}" --net --mount --wd="$LAB/db/data" \
        setpriv --reuid=$user --regid=$user --clear-groups "$@"
}

database_make() {
    local disk
    disk=$(disk db)
    (umask 077 && head -c 18 /dev/urandom | base64 | tr -d '/+' >"$LAB/db.password")
    if [ "$STORE" = mysql ]; then
        install -d -o mysql -g mysql -m 700 "$disk/d" && install -o mysql -m 600 /dev/null "$disk/init.sql"
        cat >"$disk/init.sql" <<SQL
CREATE DATABASE IF NOT EXISTS meshd CHARACTER SET utf8mb4;
CREATE USER IF NOT EXISTS mesh@'%' IDENTIFIED BY '$(cat "$LAB/db.password")';
GRANT SELECT, INSERT, UPDATE, DELETE, CREATE, DROP, ALTER, INDEX ON meshd.* TO mesh@'%';
SQL
        in_db mariadb-install-db --no-defaults --datadir="$LAB/db/data/d" --auth-root-authentication-method=normal \
            --skip-test-db --skip-name-resolve >"$LAB/db.log" 2>&1
    else
        install -d -o postgres -g postgres -m 700 "$disk/d" && install -o postgres -m 600 "$LAB/db.password" "$disk/password"
        in_db "$DB_BIN/initdb" -D "$LAB/db/data/d" -U mesh --pwfile="$LAB/db/data/password" --auth=scram-sha-256 \
            --locale=C -E UTF8 >"$LAB/db.log" 2>&1 || return 1
        echo 'host all all all scram-sha-256' >>"$disk/d/pg_hba.conf"
        echo 'CREATE DATABASE meshd' | in_db "$DB_BIN/postgres" --single -D "$LAB/db/data/d" postgres >>"$LAB/db.log" 2>&1
    fi
}

database_start() {
    if [ "$STORE" = mysql ]; then
        EXEC="exec" in_db mariadbd --no-defaults --datadir="$LAB/db/data/d" --socket="$LAB/db/data/d/s" --init-file="$LAB/db/data/init.sql" \
            --bind-address="$(underlay db)" --skip-name-resolve --innodb-buffer-pool-size=32M >>"$LAB/db.log" 2>&1 </dev/null &
    else
        EXEC="exec" in_db "$DB_BIN/postgres" -D "$LAB/db/data/d" -k "$LAB/db/data/d" -h "$(underlay db)" -c shared_buffers=16MB \
            >>"$LAB/db.log" 2>&1 </dev/null &
    fi
    LAST=$!
    remember "$LAST"
    disown "$LAST" # that it is killed is no news
}

database_pids() { pids db mariadbd postgres; }

database_kill() { # as a machine that loses its power
    local p gone
    mapfile -t gone < <(database_pids)
    send KILL "${gone[@]}"
    for p in "${gone[@]}"; do
        while [[ $(proc_state "$p") == [!Z] ]]; do sleep 0.02; done
        forget "$p"
    done
}

database_ask() { # SQL: as the user mesh; lines on standard output
    if [ "$STORE" = mysql ]; then
        MYSQL_PWD=$(cat "$LAB/db.password") timeout 10 ip netns exec "$RUN-db" mariadb --no-defaults -h "$(underlay db)" \
            -u mesh -N -r -e "$1" meshd
    else
        PGPASSWORD=$(cat "$LAB/db.password") timeout 10 ip netns exec "$RUN-db" "$DB_BIN/psql" -h "$(underlay db)" -U mesh \
            -v ON_ERROR_STOP=1 -q -t -A -c "$1" meshd
    fi
}
database_answers() { database_ask 'SELECT 1' >/dev/null 2>&1; }

database_sabotage() { # a member that was acknowledged vanishes, and servers are told so
    local name='JSON_VALUE(CONVERT(value USING utf8mb4), "$.record.name") REGEXP' text=name
    if [ "$STORE" = postgres ]; then
        name="convert_from(value, 'UTF8')::json -> 'record' ->> 'name' ~" text="convert_from(name, 'UTF8')"
    fi
    local key
    key=$(database_ask "SELECT $text FROM meshd_kv WHERE $text LIKE 'node/%' AND $name '^n[0-9]' LIMIT 1") && [ -n "$key" ] || return 1
    database_ask "BEGIN; UPDATE meshd_state SET revision = revision + 1;
        DELETE FROM meshd_kv WHERE name = '$key';
        INSERT INTO meshd_log (revision, name, created, tag) SELECT revision, '$key', 0, 0 FROM meshd_state;
        UPDATE meshd_kv SET modified = (SELECT revision FROM meshd_state) WHERE name = 'guard';
        INSERT INTO meshd_log (revision, name, value, created, tag)
            SELECT modified, name, value, created, 0 FROM meshd_kv WHERE name = 'guard'; COMMIT"
}

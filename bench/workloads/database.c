/* sqlite in memory: inserts, an index, joins, aggregates, updates. */
#include <sqlite3.h>
#include <string.h>

#include "work.h"

static sqlite3* db;

static void run(const char* sql) {
  char* error = NULL;
  if (sqlite3_exec(db, sql, NULL, NULL, &error) == SQLITE_OK) return;
  fprintf(stderr, "database: %s: %s\n", sql, error);
  exit(1);
}

static sqlite3_stmt* prepare(const char* sql) {
  sqlite3_stmt* s;
  if (sqlite3_prepare_v2(db, sql, -1, &s, NULL) == SQLITE_OK) return s;
  fprintf(stderr, "database: %s: %s\n", sql, sqlite3_errmsg(db));
  exit(1);
}

static uint64_t rows(uint64_t sum, const char* sql) {
  sqlite3_stmt* s = prepare(sql);
  while (sqlite3_step(s) == SQLITE_ROW)
    for (int i = 0; i < sqlite3_column_count(s); i++) sum = work_mix(sum, (uint64_t)sqlite3_column_int64(s, i));
  sqlite3_finalize(s);
  return sum;
}

int main(void) {
  uint64_t seed = 2463534242, sum = 14695981039346656037ull;
  struct work w = work_begin("sqlite");
  if (sqlite3_open(":memory:", &db) != SQLITE_OK) work_fail("sqlite3_open");
  run("create table people(id integer primary key, name text, age int, city int);"
      "create table cities(id integer primary key, name text);");
  run("begin");
  sqlite3_stmt* s = prepare("insert into people(name, age, city) values(?, ?, ?)");
  char name[64];
  for (int i = 0; i < 40000; i++) {
    const uint64_t r = work_random(&seed);
    snprintf(name, sizeof name, "name-%llu-%d", (unsigned long long)(r % 5000), i);
    sqlite3_bind_text(s, 1, name, -1, SQLITE_TRANSIENT);
    sqlite3_bind_int(s, 2, (int)(r >> 20 & 127));
    sqlite3_bind_int(s, 3, (int)(r >> 40 & 255));
    if (sqlite3_step(s) != SQLITE_DONE) work_fail("insert");
    sqlite3_reset(s);
  }
  sqlite3_finalize(s);
  s = prepare("insert into cities(id, name) values(?, ?)");
  for (int i = 0; i < 256; i++) {
    snprintf(name, sizeof name, "city-%x", i * 77);
    sqlite3_bind_int(s, 1, i);
    sqlite3_bind_text(s, 2, name, -1, SQLITE_TRANSIENT);
    if (sqlite3_step(s) != SQLITE_DONE) work_fail("insert");
    sqlite3_reset(s);
  }
  sqlite3_finalize(s);
  run("commit; create index by_name on people(name); create index by_city on people(city, age)");
  sum = rows(sum, "select city, count(*), avg(age) * 1000, max(length(name)) from people group by city order by 2 desc, 1");
  sum = rows(sum, "select count(*), sum(p.age) from people p join cities c on c.id = p.city where c.name like '%a%' and p.age > 30");
  s = prepare("select id, age from people where name >= ? order by name limit 20");
  for (int i = 0; i < 1500; i++) {
    snprintf(name, sizeof name, "name-%llu", (unsigned long long)(work_random(&seed) % 5000));
    sqlite3_bind_text(s, 1, name, -1, SQLITE_TRANSIENT);
    while (sqlite3_step(s) == SQLITE_ROW) sum = work_mix(sum, (uint64_t)sqlite3_column_int64(s, 0));
    sqlite3_reset(s);
  }
  sqlite3_finalize(s);
  run("update people set age = age + 1 where id % 7 = 0; delete from people where city between 10 and 20");
  sum = rows(sum, "select sum(age), count(*), min(id), max(id) from people");
  sqlite3_close(db);
  work_end(w);
  work_sum(w, sum, "");
  return 0;
}

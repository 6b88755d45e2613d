# The shell workload: 200 pipelines of two programs each, by dash.
i=0 sum=0
while [ $i -lt 200 ]; do
  n=$(echo "line $i of the loop" | tr a-z A-Z | wc -c)
  sum=$((sum + n))
  i=$((i + 1))
done
echo $sum
